//! Paths in records. A path is bytes, which need not be UTF-8 (path_resolution(7)), and serde only supports UTF-8. So
//! a path that is not UTF-8 is a byte string in the image, any other one is text.
//!
//! For fields: `#[serde(with = "raw_path")]`, for every type that implements [`Raw`].

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A type that contains paths.
pub trait Raw: Sized {
    /// The serialized form.
    type Form: Serialize + DeserializeOwned;
    /// Converts to the serialized form.
    fn to_form(&self) -> Self::Form;
    /// Converts back.
    fn from_form(form: Self::Form) -> Self;
}

/// As a field's `serialize_with`.
///
/// # Errors
/// The serializer's.
pub fn serialize<T: Raw, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    value.to_form().serialize(serializer)
}

/// As a field's `deserialize_with`.
///
/// # Errors
/// The deserializer's.
pub fn deserialize<'de, T: Raw, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    T::Form::deserialize(deserializer).map(T::from_form)
}

/// A path in its serialized form.
#[derive(Debug)]
pub struct Form(PathBuf);

impl Serialize for Form {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.to_str() {
            Some(text) => serializer.serialize_str(text),
            None => serializer.serialize_bytes(self.0.as_os_str().as_bytes()),
        }
    }
}

impl<'de> Deserialize<'de> for Form {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Path;
        impl Visitor<'_> for Path {
            type Value = Form;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path, as text or bytes")
            }

            fn visit_str<E>(self, text: &str) -> Result<Form, E> {
                Ok(Form(text.into()))
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Form, E> {
                Ok(Form(OsStr::from_bytes(bytes).into()))
            }

            fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Form, E> {
                Ok(Form(std::ffi::OsString::from_vec(bytes).into()))
            }
        }
        deserializer.deserialize_any(Path)
    }
}

impl Raw for PathBuf {
    type Form = Form;

    fn to_form(&self) -> Form {
        Form(self.clone())
    }

    fn from_form(form: Form) -> Self {
        form.0
    }
}

impl<T: Raw> Raw for Option<T> {
    type Form = Option<T::Form>;

    fn to_form(&self) -> Self::Form {
        self.as_ref().map(T::to_form)
    }

    fn from_form(form: Self::Form) -> Self {
        form.map(T::from_form)
    }
}

impl Raw for Vec<(i32, PathBuf)> {
    type Form = Vec<(i32, Form)>;

    fn to_form(&self) -> Self::Form {
        self.iter()
            .map(|(id, path)| (*id, path.to_form()))
            .collect()
    }

    fn from_form(form: Self::Form) -> Self {
        form.into_iter().map(|(id, path)| (id, path.0)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Record {
        #[serde(with = "super")]
        path: PathBuf,
        #[serde(with = "super")]
        other: Option<PathBuf>,
        #[serde(with = "super")]
        more: Vec<(i32, PathBuf)>,
    }

    #[derive(Serialize)]
    struct Before {
        path: PathBuf,
        other: Option<PathBuf>,
        more: Vec<(i32, PathBuf)>,
    }

    fn cbor(value: &impl Serialize) -> Vec<u8> {
        let mut bytes = Vec::new();
        ciborium::into_writer(value, &mut bytes).expect("it is plain data");
        bytes
    }

    #[test]
    fn paths_are_what_they_were() {
        for bytes in [
            &b"/plain"[..],
            b"/\xff\xfe",
            b"/half \xc3",
            "/\u{e4}".as_bytes(),
            b"",
        ] {
            let path = PathBuf::from(OsStr::from_bytes(bytes));
            for other in [Some(path.clone()), None] {
                let record = Record {
                    path: path.clone(),
                    other,
                    more: vec![(7, path.clone())],
                };
                let bytes = cbor(&record);
                let back: Record = ciborium::from_reader(&*bytes).expect("we wrote it");
                assert_eq!(back, record);
            }
        }
    }

    #[test]
    fn what_is_text_is_written_as_ever() {
        let path = PathBuf::from("/some/file");
        let (other, more) = (Some(path.clone()), vec![(7, path.clone())]);
        let before = Before {
            path: path.clone(),
            other: other.clone(),
            more: more.clone(),
        };
        assert_eq!(cbor(&Record { path, other, more }), cbor(&before));
    }
}
