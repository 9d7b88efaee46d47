//! Protocol buffers, as much as writing a profile takes: numbers, text and nested messages.
//!
//! Fields that are zero or empty are left out, as the format says. A library would bring a code generator for the two
//! kinds of field that are needed here.

/// A message that is being written.
#[derive(Debug, Default)]
pub(super) struct Message(Vec<u8>);

/// Kinds of field on the wire.
const VARINT: u64 = 0;
const LENGTH: u64 = 2;

impl Message {
    pub(super) fn number(&mut self, field: u64, value: u64) {
        if value != 0 {
            self.varint(field << 3 | VARINT);
            self.varint(value);
        }
    }

    pub(super) fn flag(&mut self, field: u64, value: bool) {
        self.number(field, u64::from(value));
    }

    /// Several numbers in one field.
    pub(super) fn numbers(&mut self, field: u64, values: &[u64]) {
        let mut packed = Message::default();
        values.iter().for_each(|v| packed.varint(*v));
        if !values.is_empty() {
            self.bytes(field, &packed.0);
        }
    }

    /// Text or bytes, also when empty: an element of a list.
    pub(super) fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | LENGTH);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn message(&mut self, field: u64, build: impl FnOnce(&mut Message)) {
        let mut inner = Message::default();
        build(&mut inner);
        self.bytes(field, &inner.0);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes on the wire, worked out by hand.
    #[test]
    fn fields_have_the_form_of_the_wire() {
        let mut m = Message::default();
        m.number(1, 300);
        m.number(2, 0);
        m.numbers(3, &[1, 128]);
        m.numbers(4, &[]);
        m.bytes(6, b"");
        m.message(5, |inner| inner.flag(1, true));
        assert_eq!(m.into_bytes(), [0x08, 0xac, 0x02, 0x1a, 3, 1, 0x80, 1, 0x32, 0, 0x2a, 2, 0x08, 1]);
    }
}
