//! Where a tracepoint has what, and what flags are called: out of the running kernel's type information, never a table.

use libbpf_rs::btf::ReferencesType;
use libbpf_rs::btf::types::{Enum, Func, FuncProto, Ptr, Typedef};
use libbpf_rs::btf::{Btf, BtfKind, BtfType};

use super::KernelRole;
use super::tracepoints::Known;
use crate::types::{memleak_kernel_layout, memleak_kernel_limits, memleak_kernel_probe as probe};

pub(super) const NONE: u8 = memleak_kernel_limits::KERNEL_NO_ARGUMENT.0 as u8;

/// What a parameter is, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// `unsigned long`
    Long,
    /// `size_t`
    Size,
    /// `gfp_t`
    Gfp,
    /// Other whole numbers: `int`, `unsigned int`, `bool`.
    Number(String),
    /// `rcu_callback_t`: in truth a number, how far a block's head is inside of it.
    Callback,
    /// Pointer, to a structure of that name.
    Pointer(Option<String>),
    Other,
}

/// The kernel's types.
pub(super) struct Layouts(Btf<'static>);

impl Layouts {
    pub(super) fn read() -> Result<Self, String> {
        Btf::from_vmlinux().map(Layouts).map_err(|e| format!("the kernel's type information cannot be read: {e:#}"))
    }

    /// Where the arguments of a tracepoint are.
    pub(super) fn of(&self, known: &Known) -> Result<memleak_kernel_layout, String> {
        let missing = || format!("this kernel has no tracepoint {}", known.name);
        let kinds = self.kinds(&format!("btf_trace_{}", known.event())).ok_or_else(missing)?;
        layout(known.number(), &kinds)
            .ok_or_else(|| format!("tracepoint {} has other arguments than expected: {kinds:?}", known.name))
    }

    /// Where the arguments of a function are.
    pub(super) fn function(&self, symbol: &str, role: KernelRole) -> Result<FunctionLayout, String> {
        let function = self.0.type_by_name::<Func<'_>>(symbol);
        let function = function.ok_or_else(|| format!("{symbol}: the kernel's type information does not have it"))?;
        let proto = FuncProto::try_from(function.referenced_type()).map_err(|_| format!("{symbol}: no prototype"))?;
        let kinds = proto.iter().map(|p| self.0.type_by_id::<BtfType<'_>>(p.ty).map_or(Kind::Other, kind)).collect();
        function_layout(kinds, role).ok_or_else(|| format!("{symbol} has other arguments than expected"))
    }

    /// Parameters of the tracepoint's functions, without the first, which is the probe's own.
    fn kinds(&self, name: &str) -> Option<Vec<Kind>> {
        let typedef = self.0.type_by_name::<Typedef<'_>>(name)?;
        let pointer = Ptr::try_from(typedef.referenced_type()).ok()?;
        let proto = FuncProto::try_from(pointer.referenced_type()).ok()?;
        let kinds = proto.iter().skip(1).map(|p| self.0.type_by_id::<BtfType<'_>>(p.ty).map_or(Kind::Other, kind));
        Some(kinds.collect())
    }
}

fn kind(ty: BtfType<'_>) -> Kind {
    let mut ty = ty;
    loop {
        let name = ty.name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        match (ty.kind(), name.as_str()) {
            (BtfKind::Typedef, "size_t") => return Kind::Size,
            (BtfKind::Typedef, "gfp_t") => return Kind::Gfp,
            (BtfKind::Typedef, "rcu_callback_t") => return Kind::Callback,
            (BtfKind::Int, "unsigned long" | "long unsigned int") => return Kind::Long,
            (BtfKind::Int, _) => return Kind::Number(name),
            (BtfKind::Ptr, _) => {
                let target = ty.next_type().map(|t| t.skip_mods_and_typedefs());
                let target = target
                    .filter(|t| t.kind() == BtfKind::Struct)
                    .and_then(|t| t.name().map(|n| n.to_string_lossy().into_owned()));
                return Kind::Pointer(target);
            }
            _ => {}
        }
        match ty.next_type() {
            Some(next) => ty = next,
            None => return Kind::Other,
        }
    }
}

/// Which argument of a function is what.
pub(super) struct FunctionLayout {
    pub(super) block: u8,
    pub(super) size: u8,
    pub(super) cache: u8,
    pub(super) gfp: u8,
    pub(super) count: u8,
    /// What it does in this kernel.
    pub(super) role: KernelRole,
}

fn function_layout(kinds: Vec<Kind>, role: KernelRole) -> Option<FunctionLayout> {
    let first = |wanted: &dyn Fn(&Kind) -> bool| kinds.iter().position(wanted).map_or(NONE, |i| i as u8);
    let last_pointer = kinds.iter().rposition(|k| matches!(k, Kind::Pointer(_))).map_or(NONE, |i| i as u8);
    let none = FunctionLayout { block: NONE, size: NONE, cache: NONE, gfp: NONE, count: NONE, role };
    let size = first(&|k| *k == Kind::Size);
    let found = match role {
        KernelRole::Alloc => {
            let cache = first(&|k| matches!(k, Kind::Pointer(Some(name)) if name == "kmem_cache"));
            let long = first(&|k| *k == Kind::Long);
            let size = if size == NONE && cache == NONE { long } else { size };
            if size == NONE && cache == NONE {
                return None;
            }
            return Some(FunctionLayout { size, cache, gfp: first(&|k| *k == Kind::Gfp), ..none });
        }
        KernelRole::Free => FunctionLayout { block: last_pointer, ..none },
        KernelRole::FreeBulk => FunctionLayout { block: last_pointer, count: size, ..none },
        // Up to 6.3 it is told where the head is; since then the block itself.
        KernelRole::FreeRcu => match first(&|k| *k == Kind::Callback) {
            NONE => FunctionLayout { block: last_pointer, role: KernelRole::Free, ..none },
            offset => FunctionLayout { block: 0, size: offset, ..none },
        },
    };
    (found.block != NONE).then_some(found)
}

/// Where what is told by the parameters' types; `None` when something is missing.
fn layout(number: usize, kinds: &[Kind]) -> Option<memleak_kernel_layout> {
    let nth = |wanted: &dyn Fn(&Kind) -> bool, n: usize| {
        kinds.iter().enumerate().filter(|(_, k)| wanted(k)).nth(n).map_or(NONE, |(i, _)| i as u8)
    };
    let long = |n| nth(&|k| *k == Kind::Long, n);
    let size = |n| nth(&|k| *k == Kind::Size, n);
    let gfp = nth(&|k| *k == Kind::Gfp, 0);
    let pointer = |n| nth(&|k| matches!(k, Kind::Pointer(_)), n);
    let to = |name: &str| nth(&|k| matches!(k, Kind::Pointer(Some(n)) if n == name), 0);
    let number_called = |name: &str| nth(&|k| matches!(k, Kind::Number(n) if n == name), 0);
    let none = memleak_kernel_layout {
        block: NONE,
        size: NONE,
        object: NONE,
        cache: NONE,
        gfp: NONE,
        caller: NONE,
        migrate_type: NONE,
        failed: NONE,
    };
    let at = match probe(number as u32) {
        probe::KERNEL_KMALLOC
        | probe::KERNEL_KMALLOC_NODE
        | probe::KERNEL_CACHE_ALLOC
        | probe::KERNEL_CACHE_ALLOC_NODE => {
            let cache = to("kmem_cache");
            if size(1) == NONE && cache == NONE {
                return None;
            }
            let (size, object) = if size(1) == NONE { (NONE, NONE) } else { (size(0), size(1)) };
            memleak_kernel_layout { block: pointer(0), size, object, cache, gfp, caller: long(0), ..none }
        }
        probe::KERNEL_KFREE | probe::KERNEL_CACHE_FREE => memleak_kernel_layout { block: pointer(0), ..none },
        probe::KERNEL_PAGE_ALLOC => {
            let (order, migrate_type) = (number_called("unsigned int"), number_called("int"));
            if order == NONE || migrate_type == NONE {
                return None;
            }
            memleak_kernel_layout { block: to("page"), size: order, gfp, migrate_type, ..none }
        }
        probe::KERNEL_PAGE_FREE => memleak_kernel_layout { block: to("page"), ..none },
        // base_addr comes before ptr. The caller and the bytes for all CPUs came with 5.18.
        probe::KERNEL_PERCPU_ALLOC => {
            if size(0) == NONE {
                return None;
            }
            memleak_kernel_layout { block: pointer(1), size: size(0), object: size(2), gfp, caller: long(0), ..none }
        }
        probe::KERNEL_PERCPU_FREE => memleak_kernel_layout { block: pointer(1), ..none },
        probe::KERNEL_VMAP_ALLOC => {
            if long(1) == NONE {
                return None;
            }
            memleak_kernel_layout { block: long(0), size: long(1), failed: number_called("int"), ..none }
        }
        probe::KERNEL_VMAP_FREE => memleak_kernel_layout { block: long(0), ..none },
        _ => return None,
    };
    (at.block != NONE).then_some(at)
}

/// Value of a member of any enumeration of the kernel that has a member of the name.
fn enum_members(btf: &Btf<'static>, wanted: impl Fn(&str) -> bool) -> Vec<(String, i64)> {
    for ty in btf.type_by_kind::<Enum<'_>>() {
        let members: Vec<(String, i64)> = ty
            .iter()
            .filter_map(|m| Some((m.name?.to_string_lossy().into_owned(), m.value)))
            .filter(|(name, _)| wanted(name))
            .collect();
        if !members.is_empty() {
            return members;
        }
    }
    Vec::new()
}

/// Names of allocation flags by bit, such as `__GFP_ZERO`; empty where the kernel's types do not name them (before 6.10).
pub fn gfp_flags() -> Vec<(String, u64)> {
    let Ok(btf) = Btf::from_vmlinux() else { return Vec::new() };
    let members = enum_members(&btf, |name| name.starts_with("___GFP_") && name.ends_with("_BIT"));
    let flag = |(name, bit): (String, i64)| {
        let short = name.strip_prefix('_')?.strip_suffix("_BIT")?.to_owned();
        let bit = u32::try_from(bit).ok().filter(|b| *b < 64)?;
        (short != "__GFP_LAST").then_some((short, 1_u64 << bit))
    };
    members.into_iter().filter_map(flag).collect()
}

/// The migrate type of movable pages.
pub(super) fn movable_type() -> i32 {
    let Ok(btf) = Btf::from_vmlinux() else { return -1 };
    let found = enum_members(&btf, |name| name == "MIGRATE_MOVABLE").first().map(|(_, value)| *value);
    found.and_then(|value| i32::try_from(value).ok()).unwrap_or(-1)
}
