#define KEEP_LARGEST_NAME keep_largest_base
#include "selection_impl.h"
