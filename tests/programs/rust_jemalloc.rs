//! A Rust program on jemalloc, which the crate tikv-jemallocator has linked in.

#[path = "rust_blocks.rs"]
mod blocks;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() {
    blocks::run();
}
