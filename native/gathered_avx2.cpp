#define GATHERED_NAME gathered_avx2
#include "gathered_impl.h"
