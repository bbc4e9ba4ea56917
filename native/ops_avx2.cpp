#define RUN_OP run_op_avx2
#include "ops_impl.h"
