// Package quotalog logs denied and failed calls, and notices, through log/slog: a sample of each kind, with hashes in place of
// keys.
//
//	log, err := quotalog.New(nil)
//	if err != nil {
//		return err
//	}
//	limiter, err := quota.NewLimiter(store, limit, &quota.Options{Observers: []func(context.Context, *quota.Call){log.Observe}})
//
// # Lines
//
//	quota denied  level Info; limit, key, op, cost, remaining, capacity, retry_after and source of the charge that decided
//	quota failed  limit, key and op of the first charge, class (see driver.Class) and err. The level is Error for quota.ErrMisconfigured, Debug
//	              for a context that ended, else Warn
//
// Both have charges, the length of the list, where that is not 1, and suppressed where lines were left out. A peek that is
// denied is an answer, and is not logged. The context is the caller's, so that a handler can add the trace.
//
// # Samples
//
// In each minute the first [Options.PerMinute] lines of each limit are logged, counted apart for denials and for each class of
// errors. The next line of the same kind says in suppressed how many were left out before it. Limits beyond the first
// [MaxLimits] are counted as one, so that the memory is bounded. Calls that the logger's level leaves out cost next to nothing.
//
// # Keys
//
// Keys are names of customers, so a line has a hash of the key, and [Observer.Hash] tells the hash of a key that one looks
// for. It is an HMAC: without [Options.Secret] no key can be guessed from it. Keys are taken out of the texts of errors too,
// in the forms in which this library writes them.
//
// # Concurrency
//
// All functions and methods may be called concurrently.
package quotalog

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Defaults and bounds of [Options].
const (
	DefaultPerMinute = 10
	MaxLimits        = 64 // limits that have samples of their own; further ones share one
)

// Options are the options of New. The zero value, and nil, take the defaults.
type Options struct {
	// Logger receives the lines; nil is slog.Default at the time of the line.
	Logger *slog.Logger
	// PerMinute is how many lines of each limit and kind are logged in a minute, 1 or more; 0 is DefaultPerMinute.
	PerMinute int
	// ShowKeys logs keys as they are, cut to quota.MaxKey bytes.
	ShowKeys bool
	// Secret is the secret of the hashes, of any length. Processes with one secret log the same hash of a key; nil is a
	// random one of this observer.
	Secret []byte
}

// An Observer logs the calls that it is told. [New] makes one.
type Observer struct {
	o     Options
	began time.Time

	mu      sync.Mutex
	limits  map[unique.Handle[string]]bool
	samples map[kind]*sample
}

// kind is the kind of a line that has a sample of its own.
type kind struct {
	limit unique.Handle[string] // of "" beyond MaxLimits
	class string                // "" for a denial
}

// sample counts the lines of a kind.
type sample struct {
	minute     int64
	lines      int   // logged in that minute
	suppressed int64 // since the last line
}

// New returns an observer. Options that are not accepted are [quota.ErrInvalid].
func New(o *Options) (*Observer, error) {
	l := &Observer{began: time.Now(), limits: map[unique.Handle[string]]bool{}, samples: map[kind]*sample{}}
	if o != nil {
		l.o = *o
	}
	switch {
	case l.o.PerMinute < 0:
		return nil, fmt.Errorf("quotalog: %w: Options.PerMinute is %d; accepted: 0 or more", quota.ErrInvalid, l.o.PerMinute)
	case l.o.PerMinute == 0:
		l.o.PerMinute = DefaultPerMinute
	}
	if l.o.Secret = slices.Clone(l.o.Secret); l.o.Secret == nil {
		l.o.Secret = make([]byte, sha256.Size)
		_, _ = rand.Read(l.o.Secret) // it cannot fail
	}
	return l, nil
}

// Hash returns the text that stands for a key in the lines: 16 hexadecimal digits.
func (l *Observer) Hash(key string) string {
	mac := hmac.New(sha256.New, l.o.Secret)
	mac.Write([]byte(key))
	return hex.EncodeToString(mac.Sum(nil)[:8])
}

func (l *Observer) logger() *slog.Logger {
	if l.o.Logger != nil {
		return l.o.Logger
	}
	return slog.Default()
}

// Observe logs a call, if it was denied or failed and its kind has lines left. It is one of quota.Options.Observers.
func (l *Observer) Observe(ctx context.Context, call *quota.Call) {
	if call.Err != nil {
		l.failed(ctx, call)
		return
	}
	if call.Granted {
		return
	}
	logger, c, d := l.logger(), &call.Charges[call.Decider], &call.Decisions[call.Decider]
	if c.Op == quota.OpPeek || !logger.Enabled(ctx, slog.LevelInfo) {
		return
	}
	suppressed, ok := l.take(c.Limit, "")
	if !ok {
		return
	}
	wait := slog.Duration("retry_after", d.RetryAfter)
	if d.RetryAfter == quota.Never {
		wait = slog.String("retry_after", "never")
	}
	attrs := l.attributes(call, c, suppressed)
	attrs = append(attrs, slog.Int64("cost", c.Cost), slog.Int64("remaining", d.Remaining), slog.Int64("capacity", d.Capacity), wait, slog.String("source", d.Source.String()))
	logger.LogAttrs(ctx, slog.LevelInfo, "quota denied", attrs...)
}

func (l *Observer) failed(ctx context.Context, call *quota.Call) {
	logger, class, level := l.logger(), driver.Class(call.Err), slog.LevelWarn
	switch {
	case errors.Is(call.Err, quota.ErrMisconfigured):
		level = slog.LevelError
	case class == "canceled" || class == "deadline":
		level = slog.LevelDebug
	}
	if !logger.Enabled(ctx, level) {
		return
	}
	c := &quota.Charge{} // of a list without charges
	if len(call.Charges) > 0 {
		c = &call.Charges[0]
	}
	suppressed, ok := l.take(c.Limit, class)
	if !ok {
		return
	}
	attrs := append(l.attributes(call, c, suppressed), slog.String("class", class), slog.String("err", l.text(call)))
	logger.LogAttrs(ctx, level, "quota failed", attrs...)
}

// take takes a line of a kind. If there is one left, it returns how many were left out before it.
func (l *Observer) take(limit *quota.Limit, class string) (suppressed int64, ok bool) {
	minute := int64(time.Since(l.began) / time.Minute)
	k := kind{class: class, limit: noLimit}
	l.mu.Lock()
	defer l.mu.Unlock()
	if limit.Err() == nil && (l.limits[limit.Handle()] || len(l.limits) < MaxLimits) {
		k.limit = limit.Handle()
		l.limits[k.limit] = true
	}
	s := l.samples[k]
	if s == nil {
		s = &sample{}
		l.samples[k] = s
	}
	if s.minute != minute {
		s.minute, s.lines = minute, 0
	}
	if s.lines == l.o.PerMinute {
		s.suppressed++
		return 0, false
	}
	s.lines++
	suppressed, s.suppressed = s.suppressed, 0
	return suppressed, true
}

var noLimit = unique.Make("")

// attributes returns the attributes that all lines have.
func (l *Observer) attributes(call *quota.Call, c *quota.Charge, suppressed int64) []slog.Attr {
	attrs := make([]slog.Attr, 0, 12)
	if c.Limit.Err() == nil {
		attrs = append(attrs, slog.String("limit", c.Limit.Name()))
	}
	key := c.Key
	if !l.o.ShowKeys {
		key = l.Hash(key)
	}
	attrs = append(attrs, slog.String("key", key[:min(len(key), quota.MaxKey)]), slog.String("op", c.Op.String()))
	if n := len(call.Charges); n != 1 {
		attrs = append(attrs, slog.Int("charges", n))
	}
	if suppressed > 0 {
		attrs = append(attrs, slog.Int64("suppressed", suppressed))
	}
	return attrs
}

// text returns the text of a call's error, with hashes in place of its keys.
func (l *Observer) text(call *quota.Call) string {
	text := call.Err.Error()
	if l.o.ShowKeys {
		return text
	}
	for i := range call.Charges {
		c := &call.Charges[i]
		hash := l.Hash(c.Key)
		for _, form := range forms(c) {
			text = strings.ReplaceAll(text, form, hash)
		}
	}
	return text
}

// forms returns the forms of a key in texts of errors: as the key of a store, quoted, cut, and as it is. A short key is no
// form by itself, since it is a part of many words.
func forms(c *quota.Charge) (forms []string) {
	if c.Limit.Err() == nil {
		forms = append(forms, string(driver.AppendKey(nil, c.Limit.Name(), c.Key)))
	}
	const cut = 64 // of the errors of package quota
	if len(c.Key) > cut {
		forms = append(forms, strconv.Quote(c.Key[:cut]+"…"))
	}
	forms = append(forms, strconv.Quote(c.Key))
	if len(c.Key) >= 4 {
		forms = append(forms, c.Key)
	}
	return forms
}

// Notices returns a receiver of notices, for the options of stores and policies, that logs each as a warning, with its name
// as the attribute notice. nil is slog.Default at the time of the notice. fleetquota.New logs its notices so.
func Notices(logger *slog.Logger) func(quota.Notice) {
	return func(n quota.Notice) {
		to := logger
		if to == nil {
			to = slog.Default()
		}
		attributes := []any{"notice", n.Name}
		if n.Err != nil {
			attributes = append(attributes, "err", n.Err)
		}
		to.Warn("fleetquota: "+n.Text, attributes...)
	}
}
