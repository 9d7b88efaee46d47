//! Functions of our own that are probed: to find out what works here, and what a hit costs.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::{Error, ErrorKind, Result};

/// Whether somebody has probes on these functions, and who waits until that is over.
static TAKEN: (Mutex<bool>, Condvar) = (Mutex::new(false), Condvar::new());

/// To be held while probes are on these functions, by whichever thread takes them off: two that count at a time would count
/// each other's calls.
pub(crate) struct Alone(());

/// Waits until nobody else has probes on these functions.
pub(crate) fn alone() -> Alone {
    // A thread that panicked has left nothing half done.
    let taken = TAKEN.0.lock().unwrap_or_else(PoisonError::into_inner);
    let mut taken = TAKEN.1.wait_while(taken, |taken| *taken).unwrap_or_else(PoisonError::into_inner);
    *taken = true;
    Alone(())
}

impl Drop for Alone {
    fn drop(&mut self) {
        *TAKEN.0.lock().unwrap_or_else(PoisonError::into_inner) = false;
        TAKEN.1.notify_one();
    }
}

// Like most functions of real allocators they start with a push, which the kernel emulates: what is measured on them
// holds for those. In assembly, because a compiler may inline, merge or start them otherwise.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".pushsection .text.memleak_own_code, \"ax\", @progbits",
    ".p2align 4",
    ".type memleak_own_allocate, @function",
    ".globl memleak_own_allocate",
    "memleak_own_allocate:",
    "push rbp",
    "mov rbp, rsp",
    "lea rax, [rdi + 4096]",
    "pop rbp",
    "ret",
    ".size memleak_own_allocate, . - memleak_own_allocate",
    ".p2align 4",
    ".type memleak_own_release, @function",
    ".globl memleak_own_release",
    "memleak_own_release:",
    "push rbp",
    "mov rbp, rsp",
    "pop rbp",
    "ret",
    ".size memleak_own_release, . - memleak_own_release",
    // The kernel single-steps its first instruction, as it does the one of glibc's free.
    ".p2align 4",
    ".type memleak_own_release_stepped, @function",
    ".globl memleak_own_release_stepped",
    "memleak_own_release_stepped:",
    "test rdi, rdi",
    "push rbp",
    "mov rbp, rsp",
    "pop rbp",
    "ret",
    ".size memleak_own_release_stepped, . - memleak_own_release_stepped",
    ".popsection",
);

#[cfg(target_arch = "x86_64")]
unsafe extern "C" {
    safe fn memleak_own_allocate(n: u64) -> u64;
    safe fn memleak_own_release(block: u64);
    safe fn memleak_own_release_stepped(block: u64);
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(never)]
extern "C" fn memleak_own_allocate(n: u64) -> u64 {
    std::hint::black_box(n.wrapping_add(4096))
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(never)]
extern "C" fn memleak_own_release(block: u64) {
    std::hint::black_box(block);
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(never)]
extern "C" fn memleak_own_release_stepped(block: u64) {
    std::hint::black_box(block);
}

/// Looks like an allocator's function: returns `n + 4096`.
pub(crate) fn allocate(n: u64) -> u64 {
    memleak_own_allocate(n)
}

/// Address of the function behind [`allocate`].
pub(crate) fn allocate_address() -> u64 {
    memleak_own_allocate as *const () as u64
}

/// Looks like an allocator's free.
pub(crate) fn release(block: u64) {
    memleak_own_release(block);
}

/// Address of the function behind [`release`].
pub(crate) fn release_address() -> u64 {
    memleak_own_release as *const () as u64
}

/// Looks like an allocator's free whose first instruction the kernel single-steps.
pub(crate) fn release_stepped(block: u64) {
    memleak_own_release_stepped(block);
}

/// Address of the function behind [`release_stepped`].
pub(crate) fn release_stepped_address() -> u64 {
    memleak_own_release_stepped as *const () as u64
}

/// Offset in our own executable file of an address of our own code.
pub(crate) fn offset(address: u64) -> Result<usize> {
    let maps = std::fs::read_to_string("/proc/self/maps")
        .map_err(|e| Error::new(ErrorKind::Kernel, format!("failed to read /proc/self/maps: {e}")))?;
    for line in maps.lines() {
        let mut fields = line.split_ascii_whitespace();
        let range = fields.next().unwrap_or_default();
        let file_offset = fields.nth(1).and_then(|f| u64::from_str_radix(f, 16).ok());
        let bounds = range
            .split_once('-')
            .and_then(|(a, b)| Some((u64::from_str_radix(a, 16).ok()?, u64::from_str_radix(b, 16).ok()?)));
        if let (Some((start, end)), Some(file_offset)) = (bounds, file_offset)
            && (start..end).contains(&address)
        {
            let offset = address - start + file_offset;
            return usize::try_from(offset).map_err(|e| Error::new(ErrorKind::Kernel, e.to_string()));
        }
    }
    Err(Error::new(ErrorKind::Kernel, "failed to find our own code in /proc/self/maps"))
}
