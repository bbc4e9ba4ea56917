#define SPMM_NAME spmm_base
#include "spmm_impl.h"
