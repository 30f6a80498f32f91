//! How values come in: every refusal has the one shape of errors, every body a size and a time limit.

use std::str::FromStr;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use commonage_plc_api::rest::MAX_BODY;
use commonage_plc_api::{ApiError, Code};
use http_body_util::LengthLimitError;
use serde::de::DeserializeOwned;

use crate::error::{Error, invalid};
use crate::permit::Caller;

const BODY_TIME: Duration = Duration::from_secs(30);

/// Who calls.
pub struct Who(pub Caller);

impl<S: Send + Sync> FromRequestParts<S> for Who {
    type Rejection = Error;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Error> {
        let caller = parts.extensions.get::<Caller>().cloned();
        let nobody = || ApiError::new(Code::Unauthenticated, "the caller did not say who it is");
        Ok(Self(caller.ok_or_else(nobody)?))
    }
}

/// The one name in the path.
pub struct Named<T>(pub T);

impl<S: Send + Sync, T> FromRequestParts<S> for Named<T>
where
    T: FromStr + Send,
    T::Err: std::fmt::Display,
{
    type Rejection = Error;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let bad = |why: String| Error::from(invalid(why, "correct the name in the path"));
        let Path(text) =
            Path::<String>::from_request_parts(parts, state).await.map_err(|e| bad(e.body_text()))?;
        text.parse().map(Self).map_err(|e: T::Err| bad(e.to_string()))
    }
}

/// Two names in the path.
pub struct Named2<T>(pub T, pub String);

impl<S: Send + Sync, T> FromRequestParts<S> for Named2<T>
where
    T: FromStr + Send,
    T::Err: std::fmt::Display,
{
    type Rejection = Error;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let bad = |why: String| Error::from(invalid(why, "correct the names in the path"));
        let Path((first, second)) = Path::<(String, String)>::from_request_parts(parts, state)
            .await
            .map_err(|e| bad(e.body_text()))?;
        let first = first.parse().map_err(|e: T::Err| bad(e.to_string()))?;
        Ok(Self(first, second))
    }
}

/// What stands behind the `?`.
pub struct Asked<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = Error;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        let Query(value) =
            query.map_err(|e| invalid(e.body_text(), "the parameters are listed by `plcd openapi`"))?;
        Ok(Self(value))
    }
}

/// A JSON body.
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Error;
    async fn from_request(request: Request, _: &S) -> Result<Self, Error> {
        let read = axum::body::to_bytes(request.into_body(), MAX_BODY);
        let late = |_| invalid("the body did not come within 30 s", "send it again");
        let bytes = tokio::time::timeout(BODY_TIME, read).await.map_err(late)?.map_err(|e| {
            let too_large = std::error::Error::source(&e).is_some_and(|s| s.is::<LengthLimitError>());
            if too_large {
                let message = format!("the body is larger than {MAX_BODY} bytes");
                ApiError::new(Code::TooLarge, message).hint("send less")
            } else {
                invalid(format!("the body cannot be read: {e}"), "send it again")
            }
        })?;
        let value = serde_json::from_slice(&bytes).map_err(|e| {
            invalid(
                format!("the body is not what this call takes: {e}"),
                "the types are listed by `plcd openapi`",
            )
        })?;
        Ok(Self(value))
    }
}
