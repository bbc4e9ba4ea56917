#define RUN_OP run_op_base
#include "ops_impl.h"
