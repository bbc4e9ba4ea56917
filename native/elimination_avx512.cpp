#define ELIMINATE_NAME eliminate_avx512
#include "elimination_impl.h"
