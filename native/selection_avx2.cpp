#define KEEP_LARGEST_NAME keep_largest_avx2
#include "selection_impl.h"
