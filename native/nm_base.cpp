#define NM_NAME grouped_base
#include "nm_impl.h"
