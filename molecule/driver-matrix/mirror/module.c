/* Does nothing, but is a kernel module of a version, built by DKMS for real kernel headers. */
#include <linux/module.h>

MODULE_DESCRIPTION("stand-in for NVIDIA's driver");
MODULE_LICENSE("GPL");
MODULE_VERSION(DRIVER_VERSION);
