#define NM_NAME grouped_bf16
#include "nm_impl.h"
