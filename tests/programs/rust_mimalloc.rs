//! A Rust program on mimalloc, which the crate mimalloc has linked in.

#[path = "rust_blocks.rs"]
mod blocks;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    blocks::run();
}
