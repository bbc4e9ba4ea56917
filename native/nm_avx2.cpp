#define NM_NAME grouped_avx2
#include "nm_impl.h"
