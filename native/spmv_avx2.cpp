#define SPMV_NAME spmv_avx2
#include "spmv_impl.h"
