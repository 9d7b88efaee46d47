//! Takes breakpoints out of a process that a tracker was killed over.
//!
//! Probes are file descriptors and go with their owner. But the kernel changes no code on behalf of a thread that is about to die of
//! SIGKILL: one that is killed in the middle of attaching or detaching leaves breakpoints behind that nobody counts and the
//! process pays for ("failed to unregister, leaking uprobe"). They go when the next probe at the same place is removed. So somebody
//! else is told of attachments before they are made, and removes such probes once the tracker has gone.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libbpf_sys::{
    BPF_TRACE_UPROBE_MULTI, BPF_TRACE_UPROBE_SESSION, bpf_link_create, bpf_link_create_opts,
    bpf_link_create_opts__bindgen_ty_1, bpf_link_create_opts__bindgen_ty_1__bindgen_ty_3,
};

/// Most places of one [`Attachment`].
pub const MAX_PLACES: usize = 64;

/// Probes in one file of a process.
#[derive(Clone, Copy, Debug)]
pub struct Attachment<'a> {
    /// The process.
    pub pid: u32,
    /// A program for such probes, which does nothing where it does not know the cookie.
    pub program: BorrowedFd<'a>,
    /// It is one for sessions.
    pub session: bool,
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where in the file, at most [`MAX_PLACES`].
    pub offsets: &'a [u64],
}

/// Who sweeps when the tracker is no longer there.
pub trait Witness {
    /// Probes are about to be attached, for the first time or again and again.
    fn attaching(&self, attachment: &Attachment<'_>);
    /// All probes of a process have been detached.
    fn detached(&self, pid: u32);
}

impl Attachment<'_> {
    /// Attaches a probe that does nothing to each place, and removes them all. Makes system calls only: for a process that was
    /// forked from one with threads.
    ///
    /// # Errors
    /// The kernel refuses, for instance because the process has ended.
    pub fn sweep(&self) -> io::Result<()> {
        let mut path = [0_u8; 32];
        // What is left over stays 0, the end of the string.
        let _ = write!(&mut path[..31], "/proc/self/fd/{}", self.file.as_raw_fd());
        // No function has this index.
        let cookies = [u64::from(u32::MAX); MAX_PLACES];
        let offsets = &self.offsets[..self.offsets.len().min(MAX_PLACES)];
        let multi = bpf_link_create_opts__bindgen_ty_1__bindgen_ty_3 {
            path: path.as_ptr().cast(),
            offsets: offsets.as_ptr(),
            cookies: cookies.as_ptr(),
            cnt: offsets.len() as u32,
            pid: self.pid,
            ..Default::default()
        };
        let opts = bpf_link_create_opts {
            sz: size_of::<bpf_link_create_opts>() as u64,
            __bindgen_anon_1: bpf_link_create_opts__bindgen_ty_1 { uprobe_multi: multi },
            ..Default::default()
        };
        let kind = if self.session { BPF_TRACE_UPROBE_SESSION } else { BPF_TRACE_UPROBE_MULTI };
        // SAFETY: `opts` and what it points at live over the call; `cookies` is at least as long as `offsets`.
        let link = unsafe { bpf_link_create(self.program.as_raw_fd(), 0, kind, &raw const opts) };
        if link < 0 {
            return Err(io::Error::from_raw_os_error(-link));
        }
        // SAFETY: a new descriptor that nobody else owns.
        drop(unsafe { OwnedFd::from_raw_fd(link) });
        Ok(())
    }
}
