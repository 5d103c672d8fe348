// Stands before torch's ATen/Context.h, which every header of an operator includes and none of their declarations uses.
#pragma once
