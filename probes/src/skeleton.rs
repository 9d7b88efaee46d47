//! Generated skeletons of the BPF objects.

/// The tracker of allocator calls.
#[expect(unused_qualifications, clippy::undocumented_unsafe_blocks, reason = "generated")]
pub(crate) mod userspace_alloc {
    include!(concat!(env!("OUT_DIR"), "/userspace_alloc.skel.rs"));
}

/// The tracker of the kernel's own allocations.
#[expect(unused_qualifications, clippy::undocumented_unsafe_blocks, reason = "generated")]
pub(crate) mod kernel_alloc {
    include!(concat!(env!("OUT_DIR"), "/kernel_alloc.skel.rs"));
}

/// The feature tests.
#[expect(unused_qualifications, clippy::undocumented_unsafe_blocks, reason = "generated")]
pub(crate) mod features {
    include!(concat!(env!("OUT_DIR"), "/features.skel.rs"));
}
