#define ELIMINATE_NAME eliminate_base
#include "elimination_impl.h"
