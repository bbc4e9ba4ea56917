#define SPMM_NAME spmm_avx2
#include "spmm_impl.h"
