#define SPMV_NAME spmv_bf16
#include "spmv_impl.h"
