// What torch asks of a CUDA device below Python, where there is none: how many there are, which is the current
// one, which stream. Every answer is "one device, its default stream".
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <new>

namespace {
c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;

struct MakeBelieve : public at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
static_assert(sizeof(MakeBelieve) == sizeof(at::CUDAHooksInterface));
} // namespace

// The guard stays: autograd asks once, at the first backward pass, how many devices it serves.
extern "C" void install() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)].store(&guard);
}

// Torch made its object of answers when it was imported, and keeps it: other answers take that object's place.
extern "C" void make_believe(int on) {
  auto* place = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  if (on) {
    new (place) MakeBelieve();
  } else {
    new (place) at::CUDAHooksInterface();
  }
}
