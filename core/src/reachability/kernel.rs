//! Pointers that only the kernel holds: what a process has handed over with `epoll_ctl`, `timer_create`, `io_uring`, AIO.
//!
//! The data words of epoll and of timers can be read (`/proc/PID/fdinfo/FD`, `/proc/PID/timers`) and are roots like any
//! other. What a request under way carries cannot: of those only their greatest number is known, and so many blocks may
//! be held by them (see [`super::SiteVerdict::in_requests`]).

use std::fs::File;
use std::io::Read as _;

use crate::maps::{Backing, Maps};
use crate::process::ProcDir;
use crate::sys;

/// Most descriptors that are looked at.
const MAX_DESCRIPTORS: usize = 100_000;
/// Most words that are kept.
const MAX_WORDS: usize = 1_000_000;
/// Most text that is read about descriptors, bytes: an epoll instance has a line for each that it watches.
const MAX_TEXT: u64 = 64 << 20;
/// `struct aio_ring` (fs/aio.c): place of the number of events, and what tells that it is one.
const AIO_NR: u64 = 4;
const AIO_MAGIC_AT: u64 = 16;
const AIO_MAGIC: u32 = 0xa10a_10a1;

/// What the kernel holds for a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Words that it was given and gives back.
    pub words: Vec<u64>,
    /// At most so many requests are under way of which it cannot be told what they carry.
    pub in_requests: u64,
}

/// Looks at everything that a process has handed over; what cannot be read holds nothing. Ends early when `is_over`
/// says so.
pub fn held(dir: &ProcDir, maps: &Maps, is_over: &dyn Fn() -> bool) -> Held {
    let mut held = Held::default();
    let mut room = MAX_TEXT;
    let pid = dir.pid();
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
    for descriptor in descriptors.flatten().take(MAX_DESCRIPTORS) {
        if is_over() {
            return held;
        }
        let Ok(kind) = std::fs::read_link(descriptor.path()) else { continue };
        let mut info = || {
            let name = descriptor.file_name();
            let mut text = Vec::new();
            let file = File::open(format!("/proc/{pid}/fdinfo/{}", name.to_str()?)).ok()?;
            room -= file.take(room).read_to_end(&mut text).ok()? as u64;
            Some(text)
        };
        match kind.to_str() {
            Some("anon_inode:[eventpoll]") => held.epoll(&info().unwrap_or_default()),
            Some("anon_inode:[io_uring]") => held.io_uring(&info().unwrap_or_default()),
            _ => {}
        }
        if room == 0 {
            // The rest is unknown: as many as there may be.
            held.add_requests(u64::MAX);
            break;
        }
    }
    held.timers(&std::fs::read(format!("/proc/{pid}/timers")).unwrap_or_default());
    for mapping in maps.iter() {
        if matches!(&mapping.backing, Backing::File { path, .. } if path.to_string_lossy().starts_with("/[aio]")) {
            let word = |at: u64| {
                let mut bytes = [0; 4];
                (sys::read_memory(pid, mapping.start + at, &mut bytes).ok()? == 4).then(|| u32::from_ne_bytes(bytes))
            };
            if word(AIO_MAGIC_AT) == Some(AIO_MAGIC) {
                held.add_requests(u64::from(word(AIO_NR).unwrap_or(0)));
            }
        }
    }
    held
}

impl Held {
    fn word(&mut self, word: u64) {
        match word {
            0 => {}
            _ if self.words.len() < MAX_WORDS => self.words.push(word),
            // Not kept, so it may hold any block.
            _ => self.add_requests(1),
        }
    }

    fn add_requests(&mut self, count: u64) {
        self.in_requests = self.in_requests.saturating_add(count);
    }

    /// Lines `tfd: 5 events: 19 data: 55d0c2a014f0 pos:0 ino:61 sdev:7`.
    fn epoll(&mut self, info: &[u8]) {
        for line in String::from_utf8_lossy(info).lines().filter(|line| line.starts_with("tfd:")) {
            let data = line.split_once("data:").and_then(|(_, rest)| rest.split_ascii_whitespace().next());
            if let Some(word) = data.and_then(|text| u64::from_str_radix(text, 16).ok()) {
                self.word(word);
            }
        }
    }

    /// Lines `SqMask: 0x7` and `CqMask: 0xf`. More requests than the completion queue has room for are possible, but the
    /// kernel then keeps what does not fit aside, which programs avoid.
    fn io_uring(&mut self, info: &[u8]) {
        let text = String::from_utf8_lossy(info);
        let mask = text.lines().find_map(|line| line.strip_prefix("CqMask:")).and_then(|m| m.trim().strip_prefix("0x"));
        let mask = mask.and_then(|text| u64::from_str_radix(text, 16).ok());
        // Without it nothing is known: as many as there may be.
        self.add_requests(mask.map_or(u64::MAX, |mask| mask.saturating_add(1)));
    }

    /// Lines `signal: 34/00007f3c5a1e4010`: the value that comes back with the signal, or is passed to the thread.
    fn timers(&mut self, text: &[u8]) {
        for line in String::from_utf8_lossy(text).lines() {
            let value = line.strip_prefix("signal:").and_then(|rest| rest.rsplit_once('/'));
            if let Some(word) = value.and_then(|(_, text)| u64::from_str_radix(text.trim(), 16).ok()) {
                self.word(word);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// The texts are the kernel's (Linux 6.18).
    #[test]
    fn words_are_read_from_the_kernels_texts() {
        let mut held = Held::default();
        held.epoll(
            b"pos:\t0\nflags:\t02\nmnt_id:\t16\nino:\t61\ntfd:        5 events:       19 data:     55d0c2a014f0  pos:0 ino:3d \
              sdev:f\ntfd:        6 events:       19 data:                0  pos:0 ino:3d sdev:f\ntfd: junk\n",
        );
        held.timers(b"ID: 0\nsignal: 34/00007f3c5a1e4010\nnotify: signal/pid.4711\nClockID: 1\nsignal: x\n");
        assert_eq!(held.words, [0x55d0_c2a0_14f0, 0x7f3c_5a1e_4010]);
        held.io_uring(b"SqMask:\t0x7\nSqHead:\t0\nCqMask:\t0xf\nCqHead:\t1\n");
        assert_eq!(held.in_requests, 16);
        held.io_uring(b"garbage");
        assert_eq!(held.in_requests, u64::MAX);
        // Any number is not more, whoever adds it.
        held.add_requests(128);
        assert_eq!(held.in_requests, u64::MAX);
    }

    /// The same from a live process: this one.
    #[test]
    fn what_epoll_was_given_is_found() {
        let (reader, _writer) = std::io::pipe().unwrap();
        // SAFETY: plain system calls; the event lives over the call, the descriptor is closed below.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        assert!(epoll >= 0);
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0x1234_5678_9abc };
        // SAFETY: as above.
        let added = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, reader.as_raw_fd(), &raw mut event) };
        assert_eq!(added, 0);
        let dir = ProcDir::open(std::process::id()).unwrap();
        let held = held(&dir, &Maps::read(&dir).unwrap(), &|| false);
        // SAFETY: made above.
        unsafe { libc::close(epoll) };
        assert!(held.words.contains(&0x1234_5678_9abc), "{held:x?}");
    }
}
