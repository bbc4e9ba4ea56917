#define RUN_OP run_op_avx512
#include "ops_impl.h"
