#define KEEP_ONLY_NAME keep_only_base
#include "zeroing_impl.h"
