package quotahttp

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/dunglas/httpsfv"
)

// blockedFor returns how long a server says that it will refuse requests such as the one that it answered: by
// Retry-After where it refused it, and else by the fields of the dialects that say that nothing is left. It
// is 0 where the answer says nothing, or nothing that can be read, and at most maxBackoff.
func blockedFor(resp *http.Response, now time.Time) time.Duration {
	h := resp.Header
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		now = date // times are the server's
	}
	switch resp.StatusCode {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable, http.StatusForbidden: // GitHub uses the last as well
		if text := h.Get("Retry-After"); text != "" {
			return resetIn(text, now)
		}
	}
	if age := h.Get("Age"); age != "" && age != "0" {
		return 0 // of a cache: another client's
	}
	blocked := byDraft(h.Values("RateLimit"))
	none := func(remaining, reset string) {
		if n, err := strconv.ParseInt(h.Get(remaining), 10, 64); err == nil && n == 0 { // some services write -1 where they do not know
			blocked = max(blocked, resetIn(h.Get(reset), now))
		}
	}
	none("X-Ratelimit-Remaining", "X-Ratelimit-Reset")
	none("Ratelimit-Remaining", "Ratelimit-Reset")
	for key := range h {
		if name, ok := strings.CutPrefix(key, "X-Ratelimit-Remaining-"); ok {
			none(key, "X-Ratelimit-Reset-"+name)
		}
		if name, ok := strings.CutSuffix(key, "-Remaining"); ok && strings.HasPrefix(key, "Anthropic-Ratelimit-") {
			none(key, name+"-Reset")
		}
	}
	return blocked
}

// byDraft reads RateLimit. A field that is no list is ignored, as the draft has it.
func byDraft(values []string) (blocked time.Duration) {
	list, err := httpsfv.UnmarshalList(values)
	if err != nil {
		return 0
	}
	for _, member := range list {
		item, ok := member.(httpsfv.Item)
		if !ok {
			continue
		}
		r, known := item.Params.Get("r")
		t, _ := item.Params.Get("t")
		if seconds, ok := t.(int64); ok && known && r == int64(0) {
			blocked = max(blocked, bounded(float64(seconds)))
		}
	}
	return blocked
}

// resetIn reads a time: seconds from now or since 1970, milliseconds since 1970, a span such as 6m0s, or a
// date.
func resetIn(text string, now time.Time) time.Duration {
	text = strings.TrimSpace(text)
	if n, err := strconv.ParseFloat(text, 64); err == nil {
		switch {
		case n >= 1e12:
			n = n/1e3 - float64(now.UnixMilli())/1e3
		case n >= 1e9:
			n -= float64(now.UnixMilli()) / 1e3
		}
		return bounded(n)
	}
	if d, err := time.ParseDuration(text); err == nil {
		return bounded(d.Seconds())
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		at, err = http.ParseTime(text)
	}
	if err != nil {
		return 0
	}
	return bounded(at.Sub(now).Seconds())
}

// bounded returns a number of seconds as a time of 0 to maxBackoff.
func bounded(seconds float64) time.Duration {
	if !(seconds > 0) { // or not a number
		return 0
	}
	return time.Duration(min(seconds, maxBackoff.Seconds()) * float64(time.Second))
}
