#define GATHERED_NAME gathered_base
#include "gathered_impl.h"
