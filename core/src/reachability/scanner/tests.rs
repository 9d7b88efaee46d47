use super::super::mark::Referrer;
use super::super::roots::{Root, RootNames};
use super::*;

#[unsafe(no_mangle)]
static mut MEMLEAK_TEST_ROOT: u64 = 0;

/// Addresses are kept turned by so many bits, so that they are none.
const TURN: u32 = 20;

fn never() -> bool {
    false
}

/// Memory of our own that stands for an allocator's: blocks in it count as tracked.
struct Arena {
    words: Vec<u64>,
}

impl Arena {
    const BLOCK: usize = 8;
    /// More than glibc ever takes from its heap: what other tests have left there must not point into the blocks.
    const AWAY: usize = 64 << 20;

    fn new(blocks: usize) -> Self {
        Arena { words: vec![0; blocks * Self::BLOCK + Self::AWAY / size_of::<u64>()] }
    }

    fn address(&self, block: usize) -> u64 {
        (&raw const self.words[block * Self::BLOCK]) as u64
    }
}

// The process is a fork of this one that does nothing: blocks referenced by a global are reachable and the way to them
// ends there, blocks that nothing refers to are lost. Addresses are kept scrambled until the fork has been made.
#[test]
fn a_live_process_is_scanned() {
    let mut arena = Arena::new(1000);
    // A list through every second block, from a global.
    for n in (0..998).step_by(2) {
        arena.words[n * Arena::BLOCK + 3] = arena.address(n + 2);
    }
    // SAFETY: only this test uses it, from this thread.
    unsafe { (&raw mut MEMLEAK_TEST_ROOT).write_volatile(arena.address(0)) };
    let hidden: Vec<u64> = (0..1000).map(|n| arena.address(n).rotate_left(TURN)).collect();
    // SAFETY: the child makes nothing but system calls until it is killed.
    let child = unsafe { libc::fork() };
    if child == 0 {
        loop {
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        }
    }
    let text = std::panic::catch_unwind(|| scan_from_outside(child as u32, &hidden));
    // SAFETY: ends and waits for our own child.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    let (text, lost) = text.unwrap();
    assert_eq!(text, "3 scans, global MEMLEAK_TEST_ROOT");
    // Stacks and freed memory of this process, which runs other tests too, hold a few of the addresses by chance.
    assert!((400..=500).contains(&lost), "{lost} of 500 blocks are lost");
}

fn scan_from_outside(pid: u32, hidden: &[u64]) -> (String, u64) {
    let dir = ProcDir::open(pid).unwrap();
    let blocks = || {
        let named = hidden.iter().enumerate();
        Ok(named
            .map(|(n, a)| Block { address: a.rotate_right(TURN), size: 64, birth_ns: n as u64, site: 1, glibc: false })
            .collect())
    };
    let scanned = scan(&dir, &Options::default(), &mut Learned::default(), blocks, &never).unwrap();
    let verdict = scanned.verdicts(&mut Tempo::new(1.0, &never)).unwrap()[&1];
    let chain = scanned.marked.chain(6, 1000);
    let root = match chain.last() {
        Some(Referrer::Root(address)) => RootNames::new(dir, scanned.maps).name(*address),
        other => panic!("{other:?}"),
    };
    let Root::Global { name: Some(name), .. } = root else { panic!("{root:?}") };
    assert!((500..=600).contains(&verdict.reachable.blocks), "{verdict:?}");
    (format!("{} scans, global {name}", verdict.scans), verdict.lost_blocks())
}

// Nothing may be read of a process that is not there, and it must say so.
#[test]
fn a_process_that_has_ended_is_refused() {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let dir = ProcDir::open(child.id()).unwrap();
    child.wait().unwrap();
    let error = scan(&dir, &Options::default(), &mut Learned::default(), || Ok(Vec::new()), &never).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Target);
}

// The limit is on what is there, and it names the setting.
#[test]
fn a_process_over_the_limit_is_refused() {
    let dir = ProcDir::open(std::process::id()).unwrap();
    let options = Options { max_bytes: 1 << 12, ..Options::default() };
    let error = scan(&dir, &options, &mut Learned::default(), || Ok(Vec::new()), &never).unwrap_err();
    assert!(error.to_string().contains("reachability.max_memory"), "{error}");
}
