//! What the Rust programs do on the allocator that each has: they keep blocks and give blocks back, each kind in a function
//! of its own name. The protocol is that of `program.h`.

use std::hint::black_box;
use std::io::{Read, Write};
use std::mem::forget;

/// Blocks of each kind that are given back.
const CHURNED: u32 = 59;

/// More than the alignment that allocators give anyway.
#[repr(align(64))]
struct Aligned {
    _bytes: [u8; 128],
}

macro_rules! kinds {
    ($($leak:ident $churn:ident $kept:literal $make:expr;)*) => {
        $(
            #[inline(never)]
            fn $leak() {
                for _ in 0..$kept {
                    forget(black_box($make));
                }
            }

            #[inline(never)]
            fn $churn() {
                for _ in 0..CHURNED {
                    drop(black_box($make));
                }
            }
        )*

        fn work() {
            $($leak(); $churn();)*
        }
    };
}

kinds! {
    leak_bytes churn_bytes 101 Vec::<u8>::with_capacity(17);
    leak_words churn_words 97 Box::new([1_u64; 5]);
    leak_zeroed churn_zeroed 89 vec![0_u8; 1003];
    leak_aligned churn_aligned 83 Box::new(Aligned { _bytes: [1; 128] });
    leak_grown churn_grown 79 grown();
}

#[inline(never)]
fn to_be_grown() -> Vec<u8> {
    Vec::with_capacity(13)
}

fn grown() -> Vec<u8> {
    let mut bytes = black_box(to_be_grown());
    bytes.reserve_exact(1029);
    bytes
}

/// The whole program.
pub fn run() {
    // Both have buffers, which are allocated at the first use.
    let (mut input, mut output) = (std::io::stdin(), std::io::stdout());
    let mut say =
        |line: &str| output.write_all(line.as_bytes()).and_then(|()| output.flush()).expect("somebody listens");
    say("ready\n");
    let mut byte = [0];
    while input.read(&mut byte).is_ok_and(|n| n == 1) && byte[0] != b'\n' {}
    work();
    say("done\n");
    while input.read(&mut byte).is_ok_and(|n| n == 1) {}
}
