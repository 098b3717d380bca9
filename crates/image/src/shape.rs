//! What a JSON document is, without keeping what it says: some MiB of small members would fill many times as much memory. Must
//! not know what the members mean.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, SeqAccess, Visitor};

use crate::MAX_CHILDREN;

/// The members by which an index is told from a manifest.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Shape<'a> {
    pub schema_version: Option<u64>,
    #[serde(borrow, default)]
    pub media_type: Option<Cow<'a, str>>,
    #[serde(default, deserialize_with = "stated")]
    pub manifests: Option<Count>,
    #[serde(default, deserialize_with = "stated")]
    pub layers: Option<Count>,
    #[serde(default, deserialize_with = "stated")]
    pub config: Option<IgnoredAny>,
}

/// A member that is there, though it be null.
fn stated<'de, D: Deserializer<'de>, T: Deserialize<'de>>(member: D) -> Result<Option<T>, D::Error> {
    T::deserialize(member).map(Some)
}

/// The length of an array, 0 for null.
pub(crate) struct Count(pub usize);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(array: D) -> Result<Self, D::Error> {
        array.deserialize_any(Counting).map(Self)
    }
}

struct Counting;

impl<'de> Visitor<'de> for Counting {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_unit<E>(self) -> Result<usize, E> {
        Ok(0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<usize, A::Error> {
        let mut count = 0;
        while array.next_element::<IgnoredAny>()?.is_some() {
            count += 1;
        }
        Ok(count)
    }
}

/// An array of [`MAX_CHILDREN`] at most; no more are read.
pub(crate) struct Few<T>(pub Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Few<T> {
    fn deserialize<D: Deserializer<'de>>(array: D) -> Result<Self, D::Error> {
        array.deserialize_seq(Gathering(PhantomData)).map(Self)
    }
}

struct Gathering<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Gathering<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<Vec<T>, A::Error> {
        let mut found = Vec::new();
        while let Some(one) = array.next_element()? {
            if found.len() == MAX_CHILDREN {
                return Err(A::Error::custom(format_args!("more than {MAX_CHILDREN} members")));
            }
            found.push(one);
        }
        Ok(found)
    }
}
