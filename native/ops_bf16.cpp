#define RUN_OP run_op_bf16
#include "ops_impl.h"
