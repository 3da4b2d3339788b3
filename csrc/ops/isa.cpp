// cora::isa, cora::set_isa: which CPU level runs, and which kernel each op takes at that level.
#include "check.h"
#include "cpu/kernels.h"

namespace cora {

namespace {

template <typename Fn>
void append(std::string& text, const cpu::KernelTable<Fn>& table) {
  if (table() == nullptr) return;  // for higher levels only
  text += std::string(" ") + table.name + "=" + cpu::isa_name(table.level(cpu::active_isa()));
}

/// "avx512 fake_quantize=avx512 pack_row=avx2 ..."
std::string isa() {
  std::string text = cpu::isa_name(cpu::active_isa());
#define CORA_APPEND(Fn, name) append(text, cpu::k_##name);
  CORA_KERNELS(CORA_APPEND)
  return text;
}

void set_isa(std::string name) { cpu::set_active_isa(name); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cora, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("set_isa", TORCH_BOX(&set_isa));
}

}  // namespace cora
