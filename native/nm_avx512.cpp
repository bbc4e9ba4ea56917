#define NM_NAME grouped_avx512
#include "nm_impl.h"
