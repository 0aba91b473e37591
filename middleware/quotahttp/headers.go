package quotahttp

import (
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Headers is a set of dialects in which an answer tells the limits of its request. The zero value is IETF.
type Headers uint8

// The dialects. Names of fields hold the limits' names in two of them: call the limits requests and tokens
// there, or input-tokens and output-tokens.
//
// The tightest limit, of which GitHub and Draft03 tell, is the denial that lasts longest, or else the limit
// with the smallest share left. A reset is the time at which the denied request fits, or else at which the
// limit is whole again.
const (
	// IETF is RateLimit-Policy and RateLimit of draft-ietf-httpapi-ratelimit-headers-11, for every limit.
	IETF Headers = 1 << iota
	// GitHub is X-RateLimit-Limit, -Remaining, -Used, -Resource and -Reset, in seconds since 1970, for the
	// tightest limit.
	GitHub
	// OpenAI is x-ratelimit-limit-NAME, x-ratelimit-remaining-NAME and x-ratelimit-reset-NAME, a time such as
	// 6m0s, for every limit.
	OpenAI
	// Anthropic is anthropic-ratelimit-NAME-limit, -remaining and -reset, a time in RFC 3339, for every
	// limit.
	Anthropic
	// Draft03 is RateLimit-Limit, RateLimit-Remaining and RateLimit-Reset, in seconds from now, for the
	// tightest limit, as in draft-ietf-httpapi-ratelimit-headers-03 and in many proxies.
	Draft03
	// NoHeaders tells no limits. Retry-After stays.
	NoHeaders
)

const exposeField = "Access-Control-Expose-Headers"

// told is a limit that an answer tells of.
type told struct {
	limit    *quota.Limit
	decision *quota.Decision
}

// tell sets the fields of an answer, and exposes them to scripts of another origin.
func (hs Headers) tell(h http.Header, charges []quota.Charge, ds []quota.Decision, expose bool) {
	var room [8]told
	list := room[:0]
charges:
	for i := range charges {
		limit, d := charges[i].Limit, &ds[i]
		if d.Shadow || limit.Capacity() >= maxQuota || d.Source == quota.FromFallback || d.Source == quota.FromOpen || d.Source == quota.FromClosed {
			continue
		}
		for j := range list {
			if list[j].limit.Handle() == limit.Handle() {
				if tighter(d, list[j].decision) {
					list[j] = told{limit, d}
				}
				continue charges
			}
		}
		list = append(list, told{limit, d})
	}
	if len(list) == 0 {
		return
	}
	f := fieldsPool.Get().(*fields)
	defer fieldsPool.Put(f)
	f.header, f.expose = h, expose
	if hs&IETF != 0 {
		f.begin(policyField)
		for i, t := range list {
			f.text = appendPolicy(f.comma(i), t.limit)
		}
		f.begin(limitField)
		for i, t := range list {
			f.text = appendLimit(f.comma(i), t.limit, t.decision)
		}
	}
	if hs&(GitHub|Draft03) != 0 {
		tightest := list[0]
		for _, t := range list[1:] {
			if tighter(t.decision, tightest.decision) {
				tightest = t
			}
		}
		if hs&GitHub != 0 {
			f.gitHub(tightest)
		}
		if hs&Draft03 != 0 {
			f.draft03(tightest)
		}
	}
	for _, t := range list {
		if hs&OpenAI != 0 {
			f.openAI(t)
		}
		if hs&Anthropic != 0 {
			f.anthropic(t)
		}
	}
	f.set()
	f.header = nil
}

// tighter reports whether a is tighter than b, as quota.Result.Decider has it.
func tighter(a, b *quota.Decision) bool {
	return quota.Decider([]quota.Decision{*b, *a}) == 1
}

func (f *fields) gitHub(t told) {
	f.number("X-Ratelimit-Limit", t.limit.Capacity())
	f.number("X-Ratelimit-Remaining", left(t.decision))
	f.number("X-Ratelimit-Used", t.limit.Capacity()-t.decision.Remaining)
	f.number("X-Ratelimit-Reset", epoch(resetAt(t)))
	f.begin("X-Ratelimit-Resource")
	f.text = append(f.text, t.limit.Name()...)
}

func (f *fields) draft03(t told) {
	f.number("Ratelimit-Limit", t.limit.Capacity())
	f.number("Ratelimit-Remaining", left(t.decision))
	f.number("Ratelimit-Reset", seconds(reset(t)))
}

func (f *fields) openAI(t told) {
	name := t.limit.Name()
	f.number(http.CanonicalHeaderKey("X-Ratelimit-Limit-"+name), t.limit.Capacity())
	f.number(http.CanonicalHeaderKey("X-Ratelimit-Remaining-"+name), left(t.decision))
	f.begin(http.CanonicalHeaderKey("X-Ratelimit-Reset-" + name))
	f.text = append(f.text, upTo(reset(t), time.Millisecond).String()...)
}

func (f *fields) anthropic(t told) {
	name := "Anthropic-Ratelimit-" + t.limit.Name()
	f.number(http.CanonicalHeaderKey(name+"-Limit"), t.limit.Capacity())
	f.number(http.CanonicalHeaderKey(name+"-Remaining"), left(t.decision))
	f.begin(http.CanonicalHeaderKey(name + "-Reset"))
	f.text = time.Unix(epoch(resetAt(t)), 0).UTC().AppendFormat(f.text, time.RFC3339)
}

// reset returns the time after which the denied request fits, or else the limit is whole again.
func reset(t told) time.Duration {
	if d := t.decision; d.Allowed || d.RetryAfter == quota.Never {
		return d.ResetAfter
	}
	return retryAfter(t.limit, t.decision)
}

// retryAfter returns the time after which a denied request should come again. On a limit with holds the decision says when
// holds lapse, but their requests end sooner: it is then a sixteenth of their time, or a second if that is longer. Where the
// decision says a longer time than holds last, it is not they that deny.
func retryAfter(limit *quota.Limit, d *quota.Decision) time.Duration {
	if ttl := limit.TTL(); ttl > 0 && d.RetryAfter <= ttl+ttl/16 {
		return min(d.RetryAfter, max(ttl/16, time.Second))
	}
	return d.RetryAfter
}

// resetAt is the time of reset, in microseconds, by the store's clock if the decision tells it.
func resetAt(t told) int64 {
	at := int64(t.decision.At)
	if at == 0 {
		at = time.Now().UnixMicro()
	}
	return at + int64(upTo(reset(t), time.Microsecond)/time.Microsecond)
}

// epoch rounds microseconds up to seconds.
func epoch(us int64) int64 { return (us + 999_999) / 1_000_000 }

// upTo rounds a time of at most some centuries up to a unit.
func upTo(d, unit time.Duration) time.Duration {
	if rest := d % unit; rest > 0 && d < quota.Never-unit {
		d += unit - rest
	}
	return d
}

// fields are header fields that are being written: their values lie in one text, for each would else be an
// allocation.
type fields struct {
	header http.Header
	expose bool
	text   []byte
	keys   [24]string
	begins [24]int
	n      int
}

var fieldsPool = sync.Pool{New: func() any { return new(fields) }}

// begin begins the value of a field.
func (f *fields) begin(key string) {
	if f.n == len(f.keys) {
		f.set()
	}
	f.keys[f.n], f.begins[f.n] = key, len(f.text)
	f.n++
}

// comma returns the text so far, ready for element i of a list.
func (f *fields) comma(i int) []byte {
	if i > 0 {
		f.text = append(f.text, ", "...)
	}
	return f.text
}

func (f *fields) number(key string, n int64) {
	f.begin(key)
	f.text = strconv.AppendInt(f.text, n, 10)
}

// set puts the fields into the header. The two lists of the draft join those of another middleware around
// this one; the other fields have one value.
func (f *fields) set() {
	if f.n == 0 {
		return
	}
	text, values := string(f.text), make([]string, f.n)
	for i, key := range f.keys[:f.n] {
		end := len(text)
		if i+1 < f.n {
			end = f.begins[i+1]
		}
		values[i] = text[f.begins[i]:end]
		value := values[i : i+1 : i+1]
		if key == policyField || key == limitField {
			if before := f.header[key]; len(before) > 0 {
				value = append(before[:len(before):len(before)], values[i])
			}
		}
		f.header[key] = value
	}
	if f.expose {
		f.header.Add(exposeField, strings.Join(f.keys[:f.n], ", "))
	}
	f.text, f.n = f.text[:0], 0
}
