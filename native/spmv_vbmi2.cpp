#define SPMV_NAME spmv_vbmi2
#include "spmv_impl.h"
