//! Decoding with a limit of memory: the length of a section says little about it.

use std::cell::Cell;
use std::fmt;
use std::io::{self, Read};

use serde::de::{
    Deserialize, DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess,
    SeqAccess, VariantAccess, Visitor,
};

/// Overhead of the allocator.
const HEADER: usize = 16;
/// Preallocation of serde for a list of known length.
const AHEAD: usize = 1 << 20;

thread_local! {
    /// Bytes left for the current decoding; `None` after it exceeded them.
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Why decoding failed.
#[derive(Debug)]
pub(crate) enum Fault {
    /// It exceeds the memory limit.
    TooLarge,
    /// The bytes cannot be read.
    Io(io::Error),
    /// The contents are invalid.
    Meaning(String),
}

/// Decodes CBOR. Uses at most `left` bytes of memory, and subtracts those used.
pub(crate) fn decode<T: DeserializeOwned>(reader: impl Read, left: &mut u64) -> Result<T, Fault> {
    LEFT.set(Some(*left));
    let decoded = ciborium::from_reader::<Whole<T>, _>(reader);
    *left = LEFT.take().ok_or(Fault::TooLarge)?;
    decoded.map(|whole| whole.0).map_err(|error| match error {
        ciborium::de::Error::Io(error) => Fault::Io(error),
        ciborium::de::Error::Semantic(_, text) => Fault::Meaning(text),
        other => Fault::Meaning(other.to_string()),
    })
}

fn take<E: Error>(bytes: usize) -> Result<(), E> {
    let left = LEFT.get().and_then(|left| left.checked_sub(bytes as u64));
    LEFT.set(left);
    left.map(drop).ok_or_else(|| E::custom("too large"))
}

/// The outermost value.
struct Whole<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Whole<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(Metered(deserializer)).map(Whole)
    }
}

/// A deserializer, or a part of one, whose values are counted.
struct Metered<T>(T);

/// A visitor of such a deserializer.
struct Counting<V> {
    visitor: V,
    /// Its result is allocated separately, not as a part of a record.
    grows: bool,
}

/// Elements or entries of a value.
struct Elements<A> {
    access: A,
    grows: bool,
}

macro_rules! methods {
    ($($method:ident($($argument:ident: $type:ty),*) $grows:literal)*) => {
        $(fn $method<V: Visitor<'de>>(self, $($argument: $type,)* visitor: V) -> Result<V::Value, D::Error> {
            self.0.$method($($argument,)* Counting { visitor, grows: $grows })
        })*
    };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Metered<D> {
    type Error = D::Error;

    methods! {
        deserialize_any() true
        deserialize_bool() false
        deserialize_i8() false
        deserialize_i16() false
        deserialize_i32() false
        deserialize_i64() false
        deserialize_i128() false
        deserialize_u8() false
        deserialize_u16() false
        deserialize_u32() false
        deserialize_u64() false
        deserialize_u128() false
        deserialize_f32() false
        deserialize_f64() false
        deserialize_char() false
        deserialize_str() true
        deserialize_string() true
        deserialize_bytes() true
        deserialize_byte_buf() true
        deserialize_option() false
        deserialize_unit() false
        deserialize_unit_struct(name: &'static str) false
        deserialize_newtype_struct(name: &'static str) false
        deserialize_seq() true
        deserialize_tuple(len: usize) false
        deserialize_tuple_struct(name: &'static str, len: usize) false
        deserialize_map() true
        deserialize_struct(name: &'static str, fields: &'static [&'static str]) false
        deserialize_enum(name: &'static str, variants: &'static [&'static str]) false
        deserialize_identifier() false
        deserialize_ignored_any() false
    }

    fn is_human_readable(&self) -> bool {
        self.0.is_human_readable()
    }
}

macro_rules! plain {
    ($($method:ident: $type:ty)*) => {
        $(fn $method<E: Error>(self, value: $type) -> Result<V::Value, E> {
            self.visitor.$method(value)
        })*
    };
}

macro_rules! with_length {
    ($($method:ident: $type:ty)*) => {
        $(fn $method<E: Error>(self, value: $type) -> Result<V::Value, E> {
            if self.grows {
                take(value.len() + HEADER)?;
            }
            self.visitor.$method(value)
        })*
    };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Counting<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.visitor.expecting(f)
    }

    plain! {
        visit_bool: bool
        visit_i8: i8
        visit_i16: i16
        visit_i32: i32
        visit_i64: i64
        visit_i128: i128
        visit_u8: u8
        visit_u16: u16
        visit_u32: u32
        visit_u64: u64
        visit_u128: u128
        visit_f32: f32
        visit_f64: f64
        visit_char: char
    }

    with_length! {
        visit_str: &str
        visit_borrowed_str: &'de str
        visit_string: String
        visit_bytes: &[u8]
        visit_borrowed_bytes: &'de [u8]
        visit_byte_buf: Vec<u8>
    }

    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_none()
    }

    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.visitor.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_some(Metered(inner))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, inner: D) -> Result<V::Value, D::Error> {
        self.visitor.visit_newtype_struct(Metered(inner))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let grows = self.grows;
        if grows {
            take(HEADER)?;
        }
        self.visitor.visit_seq(Elements { access, grows })
    }

    fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        let grows = self.grows;
        self.visitor.visit_map(Elements { access, grows })
    }

    fn visit_enum<A: EnumAccess<'de>>(self, access: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_enum(Metered(access))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for Metered<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(Metered(deserializer))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for Elements<A> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        let size = size_of::<S::Value>();
        // Beyond the preallocation a list doubles its capacity.
        let ahead = self.access.size_hint();
        let known = ahead.is_some_and(|n| n <= AHEAD / size.max(1));
        let element = self.access.next_element_seed(Metered(seed))?;
        if self.grows && element.is_some() {
            take(if known { size } else { 2 * size })?;
        }
        Ok(element)
    }

    fn size_hint(&self) -> Option<usize> {
        self.access.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Elements<A> {
    type Error = A::Error;

    fn next_key_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        let key = self.access.next_key_seed(Metered(seed))?;
        if self.grows && key.is_some() {
            take(2 * size_of::<S::Value>())?;
        }
        Ok(key)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        if self.grows {
            take(2 * size_of::<S::Value>())?;
        }
        self.access.next_value_seed(Metered(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.access.size_hint()
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for Metered<A> {
    type Error = A::Error;
    type Variant = Metered<A::Variant>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self::Variant), A::Error> {
        let (value, variant) = self.0.variant_seed(Metered(seed))?;
        Ok((value, Metered(variant)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for Metered<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, A::Error> {
        self.0.newtype_variant_seed(Metered(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, A::Error> {
        let visitor = Counting {
            visitor,
            grows: false,
        };
        self.0.tuple_variant(len, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let visitor = Counting {
            visitor,
            grows: false,
        };
        self.0.struct_variant(fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(value: &impl serde::Serialize, left: u64) -> Option<u64> {
        let mut bytes = Vec::new();
        ciborium::into_writer(value, &mut bytes).expect("to memory");
        let mut room = left;
        decode::<Vec<(u64, Vec<String>)>>(&bytes[..], &mut room).ok()?;
        Some(left - room)
    }

    #[test]
    fn what_a_list_takes_is_counted() {
        let one = (7_u64, vec!["word".to_owned()]);
        let string = 24 + 16 + 4;
        assert_eq!(left(&[&one], 1000), Some(16 + 32 + 16 + string));
        assert_eq!(left(&[&one, &one], 1000), Some(16 + 2 * (32 + 16 + string)));
    }

    #[test]
    fn more_than_is_left_is_refused() {
        let value = vec![(0_u64, Vec::<String>::new()); 100];
        assert_eq!(left(&value, 1000), None);
        assert!(left(&value, 10_000).is_some());
    }
}
