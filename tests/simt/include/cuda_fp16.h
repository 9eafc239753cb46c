#pragma once
#include "simt_runtime.h"
