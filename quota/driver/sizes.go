package driver

import (
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// The sizes that a store must bear. The texts of [AppendKey], [AppendIDKey] and [Item.AppendText], and those that [NewCAS] and
// [NewTransactional] give a database, are no larger.
const (
	// MaxStoredKey is the longest key, in bytes. Keys are UTF-8 without spaces and control characters of ASCII. Most have
	// fewer than 100 bytes: the longest one is of a request id and a group in which each byte had to be escaped.
	MaxStoredKey = 3*quota.MaxKey + 3*maxID + len("{}#")
	// MaxStoredValue is the longest value, in bytes. Values are ASCII without spaces and control characters. States of
	// most rules have fewer than 100 bytes, and the record of a request id some 60 for each charge; the longest value is
	// the state of a rule that keeps a list of MaxTail numbers.
	MaxStoredValue = 8 + (4+quota.MaxTail)*18
	// MaxEntries is the most keys of one call: those of MaxCharges charges, and one of a request id.
	MaxEntries = quota.MaxCharges + 1
	// MaxLifetime is the longest Change.TTL, of a state that never becomes fresh by itself. It is 292 years: a time of
	// expiry must not overflow, and a database with a smaller bound must cut it to that, and to no less than ten years.
	MaxLifetime time.Duration = quota.Never

	maxID = 128 // the longest Charge.ID
)
