//! Where return addresses lie, without names: what a recording keeps of every call stack.

use super::{Backing, KERNEL, Symbolizer};
use crate::recording::Location;

impl Symbolizer {
    /// Where return addresses of an observed process lie, in their order. It knows what
    /// [`Symbolizer::normalize`] has found out, and reads nothing itself.
    pub fn locations(&self, instance: u32, addresses: &[u64]) -> Vec<Location> {
        let unknown = |address: &u64| Location { offset: *address, ..Location::default() };
        let Some(known) = self.instances.get(&instance).filter(|_| instance != KERNEL) else {
            return addresses.iter().map(unknown).collect();
        };
        let locate = |address: &u64| {
            let Some(mapping) = known.find(address.saturating_sub(1)) else { return unknown(address) };
            let Some(module) = mapping.name() else { return unknown(address) };
            let build_id = match &mapping.backing {
                Backing::File { .. } => known.module(mapping).and_then(|m| m.as_ref().ok()),
                _ => None,
            };
            let build_id = build_id.and_then(|m| m.borrow().build_id().map(str::to_owned));
            Location { module: Some(module), build_id, offset: mapping.file_offset(*address) }
        };
        addresses.iter().map(locate).collect()
    }
}
