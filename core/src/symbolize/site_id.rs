//! The identity of an allocation site that survives restarts.

use std::sync::Arc;

/// What a return address lies in, named so that it is the same in the next run of the program.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ModuleName {
    /// A file with this build id (hexadecimal): the same on every host.
    BuildId(Arc<str>),
    /// A file without build id, by its path as the process sees it.
    Path(Arc<str>),
    /// Memory that the kernel named, for example `[vdso]`.
    Special(Arc<str>),
    /// Generated code, by its name in the perf map, or a function of an interpreted language, by file and name.
    Generated(Arc<str>),
    /// Memory without a name.
    Anonymous,
    /// Nothing is known to be mapped there.
    Unmapped,
}

/// A return address without what address space randomisation adds to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NormalizedFrame {
    /// What it lies in.
    pub module: ModuleName,
    /// Offset in the file; in generated code, from the start of its function (interpreted: in lines); without either, in the memory page, which
    /// is as much of an address as randomisation leaves alone.
    pub offset: u64,
}

/// The stable identity of an allocation site.
///
/// FNV-1a (64 bit) over the text `memleak-site-1`, then executable, probe set and function, the number of frames, and
/// per frame one byte for the kind of module (1 build id, 2 path, 3 special, 4 generated, 5 anonymous, 6 unmapped), its
/// name, and the offset; every text is preceded by its length, every number is 8 bytes little-endian; at the end the
/// finalizer of MurmurHash3 spreads the bits. Recordings keep these numbers, so this never changes: a new scheme gets a
/// new first text. Not the standard library's hasher, whose result may differ in its next version.
pub fn site_id(exe: &str, probe_set: &str, function: &str, frames: &[NormalizedFrame]) -> u64 {
    let mut hash = Fnv::new();
    hash.bytes(b"memleak-site-1");
    for text in [exe, probe_set, function] {
        hash.text(text);
    }
    hash.number(frames.len() as u64);
    for frame in frames {
        let (kind, name) = match &frame.module {
            ModuleName::BuildId(id) => (1, &**id),
            ModuleName::Path(path) => (2, &**path),
            ModuleName::Special(name) => (3, &**name),
            ModuleName::Generated(name) => (4, &**name),
            ModuleName::Anonymous => (5, ""),
            ModuleName::Unmapped => (6, ""),
        };
        hash.bytes(&[kind]);
        hash.text(name);
        hash.number(frame.offset);
    }
    hash.finish()
}

struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Fnv(0xcbf2_9ce4_8422_2325)
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn number(&mut self, n: u64) {
        self.bytes(&n.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.bytes(text.as_bytes());
    }

    fn finish(self) -> u64 {
        let mut h = self.0;
        h = (h ^ (h >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        h = (h ^ (h >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        h ^ (h >> 33)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(module: ModuleName, offset: u64) -> NormalizedFrame {
        NormalizedFrame { module, offset }
    }

    /// Findings and recordings of older versions are found by these numbers; a change here would orphan them.
    #[test]
    fn the_hash_is_the_documented_one() {
        let frames = [frame(ModuleName::BuildId("abcd".into()), 0x1234), frame(ModuleName::Anonymous, 7)];
        assert_eq!(site_id("/usr/bin/app", "glibc", "malloc", &frames), GOLDEN);
        assert_eq!(site_id("", "", "", &[]), GOLDEN_EMPTY);
    }
    // Computed apart from this code, by a script that follows the documentation.
    const GOLDEN: u64 = 0xa057_f8a0_1f21_940e;
    const GOLDEN_EMPTY: u64 = 0x2025_c9f7_e0c1_8ad7;

    /// Two sites that differ in anything must not be taken for one.
    #[test]
    fn every_part_counts() {
        let a = frame(ModuleName::BuildId("ab".into()), 1);
        let base = site_id("e", "p", "f", &[a.clone(), a.clone()]);
        let path = frame(ModuleName::Path("ab".into()), 1);
        let moved = frame(ModuleName::BuildId("ab".into()), 2);
        let others = [
            site_id("x", "p", "f", &[a.clone(), a.clone()]),
            site_id("ep", "", "f", &[a.clone(), a.clone()]),
            site_id("e", "p", "g", &[a.clone(), a.clone()]),
            site_id("e", "p", "f", std::slice::from_ref(&a)),
            site_id("e", "p", "f", &[path, a.clone()]),
            site_id("e", "p", "f", &[moved.clone(), a.clone()]),
            site_id("e", "p", "f", &[a, moved]),
        ];
        assert!(others.iter().all(|id| *id != base));
        assert_eq!(others.iter().collect::<std::collections::HashSet<_>>().len(), others.len());
    }
}
