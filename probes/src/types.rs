//! Rust twins of the structures in `bpf/memleak_types.h`, generated from the BPF object's type information.

pub(crate) use crate::skeleton::userspace_alloc::types::{
    memleak_block, memleak_block_bits, memleak_block_key, memleak_cohort, memleak_counter, memleak_counters,
    memleak_event, memleak_event_kind, memleak_function, memleak_function_flags, memleak_operand, memleak_operand_kind,
    memleak_process_event, memleak_process_event_kind, memleak_python, memleak_python_code, memleak_python_code_key,
    memleak_python_frame, memleak_python_got, memleak_python_stack, memleak_range, memleak_role, memleak_sampler,
    memleak_share, memleak_site, memleak_site_key, memleak_stack, memleak_stack_end, memleak_target,
    memleak_unwind_cfa, memleak_unwind_map, memleak_unwind_rbp, memleak_unwind_row, memleak_unwind_segment,
};

pub(crate) use crate::skeleton::kernel_alloc::types::{
    memleak_kernel_function, memleak_kernel_layout, memleak_kernel_limits, memleak_kernel_origin, memleak_kernel_probe,
    memleak_kernel_range, memleak_kernel_role,
};

/// Birth generations that a site tells apart.
pub const COHORTS: usize = cohorts(|s| &s.cohorts);
/// Classes of the lifetime histogram: class 0 is below 1 us, class n from 2^(n-1) to 2^n us, the last is open.
pub const LIFETIME_CLASSES: usize = lifetimes(|s| &s.lifetimes);
/// Most return addresses of a stack.
pub const MAX_FRAMES: usize = addresses(|s| &s.addresses) - 1;
/// Ranges of a process's address space that may hold its code.
pub(crate) const CODE_RANGES: usize = code_ranges(|t| &t.code);
/// Largest number of a probe set.
pub(crate) const MAX_PROBE_SET: u32 = (1 << memleak_block_bits::BLOCK_SET_BITS.0) - 1;
/// Most independent groups of probe sets.
pub const MAX_DOMAINS: usize = 8;
/// Most watched process instances at once.
pub const MAX_TARGETS: usize = 1024;

const fn cohorts<const N: usize>(_: fn(&memleak_site) -> &[memleak_cohort; N]) -> usize {
    N
}
const fn lifetimes<const N: usize>(_: fn(&memleak_site) -> &[u64; N]) -> usize {
    N
}
const fn code_ranges<const N: usize>(_: fn(&memleak_target) -> &[memleak_range; N]) -> usize {
    N
}
const fn addresses<const N: usize>(_: fn(&memleak_stack) -> &[u64; N]) -> usize {
    N
}

/// Structures that are plain bytes: every bit pattern is valid, and there is no padding.
///
/// # Safety
/// The implementor has only integer fields (or arrays of them) and no padding.
pub(crate) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($name:ident: $size:expr),* $(,)?) => {$(
        // SAFETY: integers only; the size assert below shows that there is no padding.
        unsafe impl Plain for $name {}
        const _: () = assert!(size_of::<$name>() == $size, stringify!($name));
    )*};
}

// The sizes are sums over the fields in memleak_types.h.
plain! {
    memleak_block: 3 * 8,
    memleak_block_key: 8 + 2 * 4,
    memleak_counters: 19 * 8 + 8,
    memleak_event: 6 * 8 + 6 * 4 + 16,
    memleak_function: 2 * 4 + 8 + 4 * 16 + 2 * 8 + 2 * 4,
    memleak_kernel_function: 2 * 4 + 8,
    memleak_kernel_layout: 8,
    memleak_kernel_origin: 3 * 8 + 4 * 4 + 16 + 48,
    memleak_operand: 4 + 4 + 8,
    memleak_process_event: 4 * 4 + 8,
    memleak_python: 8 + 7 * 4 + 7 + 5,
    memleak_python_code: 2 * 4 + 2 * 256 + 1024,
    memleak_python_code_key: 3 * 8,
    memleak_python_frame: 3 * 8,
    memleak_python_stack: 2 * 4 + 64 * 24 + 4 * 8 + 16 * 8,
    memleak_share: 4 * 8,
    memleak_site: 10 * 8 + 16 * COHORTS + 8 * LIFETIME_CLASSES,
    memleak_site_key: 8 + 2 * 4,
    memleak_stack: 6 * 4 + 16 + 8 * (MAX_FRAMES + 1),
    memleak_target: 6 * 4 + 8 + 16 * CODE_RANGES,
    memleak_unwind_row: 4 + 2 + 2,
    memleak_unwind_segment: 8 + 2 * 4 + 2 * 2 + 4,
    memleak_unwind_map: 8 + 1024 * 24,
}

/// The bytes of a plain value.
pub(crate) fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: `Plain` has no padding, so all size_of::<T>() bytes are initialised; the borrow keeps them alive.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// A plain value from (at least) its bytes; `None` when there are too few.
pub(crate) fn from_bytes<T: Plain>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: long enough, any bit pattern is valid for `Plain`, and the read does not need alignment.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Text of a fixed size up to its end.
pub(crate) fn text(bytes: &[libc::c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().take_while(|b| **b != 0).map(|b| b.cast_unsigned()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
