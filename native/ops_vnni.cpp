#define RUN_OP run_op_vnni
#include "ops_impl.h"
