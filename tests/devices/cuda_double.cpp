// libcuda.so.1 for tests on a machine without a GPU: a driver that shows one GPU and can do nothing with it.
#include <cstring>

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int *count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? 0 : 101;
}
int cuDeviceTotalMem_v2(unsigned long *bytes, int) {
  *bytes = 1ul << 37;
  return 0;
}
int cuDeviceGetAttribute(int *value, int, int) {
  *value = 9;
  return 0;
}
int cuDeviceGetName(char *name, int length, int) {
  std::strncpy(name, "a double of a GPU", static_cast<unsigned long>(length));
  return 0;
}
int cuDeviceGetUuid(char *uuid, int) {
  std::memset(uuid, 7, 16);
  return 0;
}
int cuDeviceGetUuid_v2(char *uuid, int device) { return cuDeviceGetUuid(uuid, device); }
int cuGetErrorString(int, const char **text) {
  *text = "an error of the double";
  return 0;
}

}  // extern "C"
