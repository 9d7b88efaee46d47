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
    let blocks = |_: &mut Tempo<'_>| {
        let named = hidden.iter().enumerate();
        Ok(named
            .map(|(n, a)| Block { address: a.rotate_right(TURN), size: 64, birth_ns: n as u64, site: 1, glibc: false })
            .collect())
    };
    let scanned = scan(&dir, &Options::default(), &mut Learned::default(), blocks, &never).unwrap();
    let verdict = scanned.verdicts(&mut Tempo::new(&Options::default(), &never)).unwrap()[&1];
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
    let error = scan(&dir, &Options::default(), &mut Learned::default(), |_| Ok(Vec::new()), &never).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Target);
}

// The limit is on what is there, and it names the setting.
#[test]
fn a_process_over_the_limit_is_refused() {
    let dir = ProcDir::open(std::process::id()).unwrap();
    let options = Options { max_bytes: 1 << 12, ..Options::default() };
    let error = scan(&dir, &options, &mut Learned::default(), |_| Ok(Vec::new()), &never).unwrap_err();
    assert!(error.to_string().contains("reachability.max_memory"), "{error}");
}

// A share of a core and of bandwidth are kept over any stretch, and a pause ends at once when the work is given up.
#[test]
fn the_tempo_is_kept_and_ends_at_once() {
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let over = || is_over.load(std::sync::atomic::Ordering::Relaxed);
    let options = |core_share, bandwidth| Options { core_share, bandwidth, ..Options::default() };
    // By the bytes.
    let mut tempo = Tempo::new(&options(1.0, 1e6), &over);
    let began = Instant::now();
    tempo.count(50_000);
    tempo.go_on().unwrap();
    assert!(began.elapsed() >= Duration::from_millis(49), "{:?}", began.elapsed());
    // By the CPU time.
    let mut tempo = Tempo::new(&options(0.1, f64::INFINITY), &over);
    let (began, cpu) = (Instant::now(), thread_cpu());
    while thread_cpu() - cpu < Duration::from_millis(5) {}
    tempo.go_on().unwrap();
    assert!(began.elapsed() >= Duration::from_millis(49), "{:?}", began.elapsed());
    // Given up in the middle of a pause of an hour.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(30));
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert!(tempo.rest(Duration::from_secs(3600)).is_err());
    });
    assert!(tempo.go_on().is_err());
}

// Memory of which the process says that it is there but that nobody may read from outside is counted as hidden.
#[test]
fn memory_that_cannot_be_read_is_told() {
    let dir = ProcDir::open(std::process::id()).unwrap();
    let options = Options { core_share: 1.0, bandwidth: f64::INFINITY, ..Options::default() };
    let mut work = Work {
        dir: &dir,
        options: &options,
        tempo: Tempo::new(&options, &never),
        cost: Cost::default(),
        coded: Coded::default(),
        in_requests: 0,
        hidden_bytes: 0,
    };
    /// Half of the pages cannot be read.
    struct Holes;
    impl Memory for Holes {
        fn read(&mut self, address: u64, buffer: &mut [u8]) -> usize {
            if (address / PAGE).is_multiple_of(2) { (PAGE as usize).min(buffer.len()) } else { 0 }
        }
    }
    let pages = vec![1_u8; 9 * PAGE as usize];
    let start = (pages.as_ptr() as u64).next_multiple_of(2 * PAGE);
    let range = |start: u64, pages: u64| Range { start, end: start + pages * PAGE };
    let index = Index::default();
    let learned = Learned::default();
    let mut read = |present: &[Range]| {
        let mut scan = Scan::new(&index, &learned);
        let result = work.read(&mut scan, present, &mut Holes, &mut Pagemap::open(std::process::id()));
        let seen = (work.cost.read_bytes, work.cost.unread_bytes, work.hidden_bytes);
        (work.cost, work.hidden_bytes) = (Cost::default(), 0);
        (result, seen)
    };
    let (result, seen) = read(&[range(start, 6)]);
    assert!(result.is_ok());
    assert_eq!(seen, (3 * PAGE, 3 * PAGE, 3 * PAGE));
    // What is gone hides nothing.
    let (result, seen) = read(&[range(start, 2), range(8 * PAGE, 4)]);
    assert!(result.is_ok());
    assert_eq!(seen, (3 * PAGE, 3 * PAGE, PAGE));
    // When nothing at all can be read there is a reason.
    let (result, _) = read(&[range(start + PAGE, 1)]);
    assert_eq!(result.unwrap_err().kind(), ErrorKind::Permission);
}
