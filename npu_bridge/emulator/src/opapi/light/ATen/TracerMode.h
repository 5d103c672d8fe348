// Stands before torch's ATen/TracerMode.h, which every header of an operator includes and none of their declarations uses.
#pragma once
