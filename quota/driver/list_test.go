package driver_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// badLister is a KV with a ListKeys that a test gives.
type badLister struct {
	driver.KV
	list func() ([]string, string, error)
}

func (l badLister) ListKeys(context.Context, string, string, int) ([]string, string, error) {
	return l.list()
}

// Errors of ListKeys are those of a call that charged nothing, and what it may not return is no page.
func TestListErrors(t *testing.T) {
	broken := errors.New("broken")
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, test := range []struct {
		name string
		kv   driver.KV
		ctx  context.Context
		l    driver.Listing
		want error
	}{
		{name: "a KV that lists", kv: newKV(nil)},
		{name: "a KV without ListKeys", kv: struct{ driver.KV }{newKV(nil)}, want: errors.ErrUnsupported},
		{name: "an error", kv: badLister{list: func() ([]string, string, error) { return nil, "", broken }}, want: quota.ErrUnavailable},
		{name: "a bad cursor", kv: badLister{list: func() ([]string, string, error) { return nil, "", driver.BadCursor("x", "y") }}, want: quota.ErrInvalid},
		{name: "a page too long", kv: badLister{list: func() ([]string, string, error) { return make([]string, 3), "", nil }}, l: driver.Listing{Size: 2}, want: quota.ErrMisconfigured},
		{name: "a panic", kv: badLister{list: func() ([]string, string, error) { panic("x") }}, want: quota.ErrMisconfigured},
		{name: "no base64", kv: newKV(nil), l: driver.Listing{Cursor: "="}, want: quota.ErrInvalid},
		{name: "a context that ended", kv: newKV(nil), ctx: canceled, want: context.Canceled},
	} {
		s := newCAS(t, test.kv, nil)
		ctx := test.ctx
		if ctx == nil {
			ctx = t.Context()
		}
		page, err := s.(driver.Lister).List(ctx, test.l)
		if !errors.Is(err, test.want) || err != nil && len(page.Keys) > 0 || test.want != nil && test.want != errors.ErrUnsupported && quota.Charged(err) != quota.NotCharged {
			t.Errorf("%s: got %+v, %v, want %v", test.name, page, err, test.want)
		}
	}
	s := newCAS(t, newKV(nil), nil)
	s.Close()
	if _, err := s.(driver.Lister).List(t.Context(), driver.Listing{}); !errors.Is(err, quota.ErrClosed) {
		t.Errorf("a closed store: got error %v, want ErrClosed", err)
	}
}

// A database may return anything that it holds: what is no key of a limit is left out.
func TestListForeignKeys(t *testing.T) {
	kv := badLister{KV: newKV(nil), list: func() ([]string, string, error) {
		return []string{"{a}:t", "{a}#id", "other", "{a}/b:t", "{a}/b:u"}, "a place", nil
	}}
	page, err := newCAS(t, kv, nil).(driver.Lister).List(t.Context(), driver.Listing{Limits: []string{"t"}})
	if err != nil {
		t.Fatal(err)
	}
	if want := []driver.ListedKey{{Limit: "t", Key: "a"}, {Limit: "t", Key: "a/b"}}; !slices.Equal(page.Keys, want) || page.Next == "" {
		t.Errorf("page: got %+v, want the keys %+v and a cursor", page, want)
	}
}
