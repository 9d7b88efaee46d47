//! How fast a scan reads memory, looks its words up and walks: `cargo bench -p memleak --bench scan`.
//!
//! Aim: 0.8 GB per second of CPU time, and 64 bytes per block. The process scans itself: 256 MiB of blocks of 256 bytes, of
//! which a quarter of the words points to other blocks at random, as bad as it gets, or next to none. Between them lies what
//! heaps are full of. Times are CPU time of the thread.

use std::time::Duration;

use memleak_core::reachability::coded::Coded;
use memleak_core::reachability::memory::{Memory, ProcessMemory};
use memleak_core::reachability::{Block, Index, Learned, Scan};

const HEAP: usize = 256 << 20;
const BLOCK: usize = 256;
const CHUNK: usize = 256 << 10;
const WORD: usize = size_of::<u64>();

/// What lies between the pointers.
#[derive(Clone, Copy, Debug)]
enum Filling {
    Zeroes,
    SmallNumbers,
    Text,
    Random,
}

fn cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable over the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("our own");
    let pages = text.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number");
    4096 * pages
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn run(filling: Filling, pointers_percent: u64) {
    let mut random = Random(88_172_645_463_325_252);
    let mut heap = vec![0_u64; HEAP / WORD];
    let base = heap.as_ptr() as u64;
    let count = HEAP / BLOCK;
    for word in &mut heap {
        let is_pointer = random.next() % 100 < pointers_percent;
        *word = match filling {
            _ if is_pointer => base + random.next() % count as u64 * BLOCK as u64,
            Filling::Zeroes => 0,
            Filling::SmallNumbers => random.next() % 1000,
            Filling::Text => 0x6161_6161_6161_6161 + (random.next() & 0x0707_0707_0707_0707),
            Filling::Random => random.next(),
        };
    }
    let before = resident();
    // The kernel's table gives them in no order.
    let mut blocks: Vec<Block> = (0..count)
        .map(|n| Block {
            address: base + (n * BLOCK) as u64,
            size: BLOCK as u64 - 8,
            birth_ns: 1,
            site: n as u32 % 100,
            glibc: false,
        })
        .collect();
    for n in (1..count).rev() {
        blocks.swap(n, random.next() as usize % (n + 1));
    }
    let began = cpu();
    let index = Index::new(blocks);
    let indexed = cpu() - began;
    let (mut coded, mut learned) = (Coded::default(), Learned::default());
    // The first scan of a series does less: it only counts what may be coded.
    for number in 1..=2 {
        coded.begin(false);
        let mut memory = ProcessMemory::new(std::process::id());
        let mut scan = Scan::new(&index, &learned).with_coded(&mut coded);
        let mut buffer = vec![0; CHUNK];
        let (began, mut reading) = (cpu(), Duration::ZERO);
        scan.visit_register(0, base);
        for at in (base..base + HEAP as u64).step_by(CHUNK) {
            let before = cpu();
            let got = memory.read(at, &mut buffer);
            reading += cpu() - before;
            scan.visit(at, &buffer[..got]);
        }
        let seen = cpu();
        let marked = scan.finish(&mut memory, &mut || Ok(())).expect("nobody stops it");
        let walked = cpu();
        let speed = |time: Duration| HEAP as f64 / 1e9 / time.as_secs_f64();
        println!(
            "{filling:?}, {pointers_percent} % pointers, scan {number}: {:.2} GB/s in all; reading {:.2}, with lookup {:.2} \
             GB/s; walk {:?}, index {indexed:?}; {:.1} bytes per block",
            speed(walked - began),
            speed(reading),
            speed(seen - began),
            walked - seen,
            (resident() - before) as f64 / count as f64
        );
        learned = marked.learned;
    }
    drop(heap);
}

fn main() {
    for filling in [Filling::Zeroes, Filling::SmallNumbers, Filling::Text, Filling::Random] {
        for pointers_percent in [3, 25] {
            run(filling, pointers_percent);
        }
    }
}
