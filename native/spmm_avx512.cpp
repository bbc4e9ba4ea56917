#define SPMM_NAME spmm_avx512
#include "spmm_impl.h"
