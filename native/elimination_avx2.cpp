#define ELIMINATE_NAME eliminate_avx2
#include "elimination_impl.h"
