#define SPMV_NAME spmv_base
#include "spmv_impl.h"
